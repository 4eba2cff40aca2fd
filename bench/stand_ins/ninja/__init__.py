"""Writes and runs build files as ``setup.py`` does with ninja; everything is built every time."""
