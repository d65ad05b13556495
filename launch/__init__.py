"""Entry points for `deepspeed launch/X.py`, thin on purpose."""
