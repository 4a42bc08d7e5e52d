"""The folder that the runner puts first on PYTHONPATH; the file beside this one is what Python imports from it."""
