"""Audits what a run or a store has kept: composes the attacks of `privacy.audit` with photos, models and settings."""
