"""Bytes of objects, wherever they are: disks, S3, GCS, web servers. Knows nothing of shards."""

__all__: list[str] = []
