"""Continual methods, a paper a file. A new method is one new file with one subclass of `base.Method`."""
