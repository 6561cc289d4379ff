"""Attacks of other libraries behind one wrapper."""
