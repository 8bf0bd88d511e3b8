"""Measurements that the README and the documents cite; each runs by itself."""
