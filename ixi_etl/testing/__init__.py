"""Simulated archives and a loopback HTTP server, for the tests and the demo."""

__all__ = ["anatomies", "loopback", "phantom"]
