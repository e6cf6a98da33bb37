"""Algorithms that see only a matrix-vector product, and the operators that give them one."""
