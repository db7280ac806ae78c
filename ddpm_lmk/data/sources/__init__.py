"""Raw data of users: folders, tars, tables, DICOM trees and the public sets."""
