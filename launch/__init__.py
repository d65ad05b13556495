"""Entry points and cluster tools."""

__all__: list[str] = []
