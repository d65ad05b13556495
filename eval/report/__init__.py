"""One self-contained page from evaluation folders."""
