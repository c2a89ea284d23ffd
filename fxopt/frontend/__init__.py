"""fxopt.frontend"""
