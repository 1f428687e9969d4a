"""Models and contexts: decode into them, save them, bring them back."""
