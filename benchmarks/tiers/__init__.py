"""Tiers, tenants and quotas of a real cluster under load, measured by its clients."""
