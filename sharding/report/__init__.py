"""What is in a packed corpus: statistics, a gallery, a contact sheet."""
