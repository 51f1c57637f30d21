"""Measurements, one script each; every number that the project claims comes from one."""
