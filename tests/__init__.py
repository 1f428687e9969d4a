"""The tests."""

# conftest.py sets it to False where -m leaves out all tests that need a libllama.
LIBLLAMA_WANTED = True
NOT_WANTED = "it needs a libllama, and -m leaves these tests out"
