"""From annotations and media files to webdataset shards with their indices."""
