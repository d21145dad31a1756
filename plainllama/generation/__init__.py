"""Prompts -> text or states."""
