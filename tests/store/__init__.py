"""Tests of the prefix store that use no llama.cpp."""
