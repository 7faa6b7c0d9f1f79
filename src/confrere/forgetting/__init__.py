"""Forgetting: a run without a site or patients that it was trained on, and a certificate of what was done."""
