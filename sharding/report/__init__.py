"""Reports on a packed corpus: statistics, a gallery, a contact sheet."""
