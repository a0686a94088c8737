"""Text in and out: tokenizers and chat templates. It knows no model and computes nothing on a device."""
