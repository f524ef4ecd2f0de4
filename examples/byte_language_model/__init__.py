"""Byte-level language models of several mixers, trained alike and compared."""
