"""Stages that protect what leaves a client."""
