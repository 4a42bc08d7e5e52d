"""Packages laid out like the old ones: a name, its parameters, a call into the rooms above. Users reach them by their old names."""
