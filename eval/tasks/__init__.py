"""One evaluation task a file: retrieval, question answering, multiple choice."""
