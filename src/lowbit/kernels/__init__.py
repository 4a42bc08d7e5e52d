"""Kernels: the code that multiplies by packed weights. `table` lists the rows; each other file is a device or a reference."""
