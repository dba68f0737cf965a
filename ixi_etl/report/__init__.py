"""Render HTML reports and SVG charts."""

__all__ = ["charts", "dataset_report", "depth_chart", "page"]
