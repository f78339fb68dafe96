"""What people see of a run: tables on the terminal, figures as PNG files, pages of HTML.

Its modules, in the order in which to read them:

- ``text``: numbers as people read them
- ``client_rows``: the table of a run's clients, as text
- ``tables``: the terminal's tables of a run and of a partition, and a run's result in a line
- ``comparison``: puts runs that differ in nothing but the seed together
- ``comparison_table``: the table of a comparison, as text and for the terminal
- ``figures``: all figures
- ``norms``: the table of how long the class vectors of a run's heads are
- ``page``: a run on one page
- ``report``: writes the page of a run or of a comparison, with all that belongs to it
"""
