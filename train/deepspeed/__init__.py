"""DeepSpeed: the engine, and the workarounds for what it does not document."""
