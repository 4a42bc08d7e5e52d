from contextlib import contextmanager
def load_low_bit(model, folder): ...
@contextmanager
def low_memory_init(): yield
