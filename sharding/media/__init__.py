"""Where media come from, and how pictures and clips become the JPEG frames that are stored."""
