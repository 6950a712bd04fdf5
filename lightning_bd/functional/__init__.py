"""Pure functions of the methods; import each from its own module."""
