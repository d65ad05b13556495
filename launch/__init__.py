"""Entry points and cluster tools."""
