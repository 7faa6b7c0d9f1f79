"""Across hospitals on Flower: the only package that imports flwr. It translates, and starts and stops processes."""
