"""Algorithms: plain functions that choose codes and scales. They know nothing of files, devices or families."""
