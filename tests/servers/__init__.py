"""Stores on servers: real ones, which the tests start and stop."""
