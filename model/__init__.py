"""The Singularity model: vision, text, fusion and temporal encoders and their losses."""
