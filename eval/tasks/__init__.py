"""One file per evaluation task: retrieval, question answering, multiple choice."""
