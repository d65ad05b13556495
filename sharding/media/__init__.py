"""Sources of media, and the conversion of images and clips to JPEG frames."""
