"""A run as one HTML file that opens anywhere: curves, maps, tables, accounts, and the data of each."""

from dynamics.report.figure import Figure as Figure
from dynamics.report.page import html as html
from dynamics.report.page import write as write
