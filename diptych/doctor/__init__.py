"""Looks at a deployment from where it runs, and says what is wrong and how to mend it."""
