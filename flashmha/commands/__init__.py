"""The commands of ``flashmha``, one a file: ``add_arguments(parser)`` says its flags, ``main(options)`` runs it.

``main`` returns the exit status: 0, or 1 where the answer is no. A wrong call raises ``ValueError``, which the command
line turns into one line and the status 2.
"""
