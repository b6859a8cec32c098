"""The demo: a small world of moving shapes, a tiny Wan that knows it, and the scores that prove a LoRA works."""
