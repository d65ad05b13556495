"""What a model reads: texts to token ids, pictures and clips to pixels; training, evaluation and Python alike."""
