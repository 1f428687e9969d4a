"""Tests with real models: what they amplify, tiny random ones do not have."""
