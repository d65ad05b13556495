"""Annotation files of many forms to rows, rows to items: an image or video with all its texts, in flat memory."""
