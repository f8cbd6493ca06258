"""Hybrid jobs: one model that trains in one layout and generates in another, in the same processes."""
