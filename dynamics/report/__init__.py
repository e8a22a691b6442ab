"""A run as one HTML file that opens anywhere: curves, maps, tables and accounts, with their data and how to make them."""

from dynamics.report.page import html as html
from dynamics.report.page import write as write
