"""Reports of many finished runs: tables, differences with intervals, pictures, one page."""
