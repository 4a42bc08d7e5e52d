"""The door to the compiled core: `library` finds and types it (ctypes), `calls` are its functions over addresses. No torch."""
