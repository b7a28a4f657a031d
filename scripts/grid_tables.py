#!/usr/bin/env python3
"""Makes src/energy/grid.csv from published tables of grid intensity.

    python3 scripts/grid_tables.py COUNTRIES.csv CLOUD.csv > src/energy/grid.csv

COUNTRIES.csv has the columns iso3,name,year,gco2e_per_kwh,source: rows of Our World in Data's energy data set
(carbon_intensity_elec, Ember; CC BY 4.0), one per country with its latest year, and of Green Algorithms' CI_aggregated
(CC BY 4.0) for the states and provinces of the United States, Canada and Australia. CLOUD.csv has the columns
provider,region,location,gco2e_per_kwh,pue,source: rows of Google's region-carbon-info (Apache-2.0), one per region and year.

Kept: those three sources. Left out: anything share-alike (Electricity Maps, co2.js), non-commercial or paid, tables without a
year or older than 2019 (mlco2/impact, cloud-carbon-footprint), and names that are groups of countries other than the world,
the European Union and continents. Changes made: rounding to a hundredth of a gram, ISO codes of two letters, Manitoba's code
(the source writes CA-MT), low and high of a Google region from the years the source covers, of the world from 2019-2024.
"""

import csv
import re
import sys

ISO2 = """AFG AF ALB AL DZA DZ ASM AS AND AD AGO AO AIA AI ATG AG ARG AR ARM AM ABW AW AUS AU AUT AT AZE AZ BHS BS BHR BH BGD BD
BRB BB BLR BY BEL BE BLZ BZ BEN BJ BMU BM BTN BT BOL BO BIH BA BWA BW BRA BR VGB VG BRN BN BGR BG BFA BF BDI BI CPV CV KHM KH
CMR CM CAN CA CYM KY CAF CF TCD TD CHL CL CHN CN COL CO COM KM COG CG COD CD COK CK CRI CR CIV CI HRV HR CUB CU CYP CY CZE CZ
DNK DK DJI DJ DMA DM DOM DO ECU EC EGY EG SLV SV GNQ GQ ERI ER EST EE SWZ SZ ETH ET FLK FK FRO FO FJI FJ FIN FI FRA FR GUF GF
PYF PF GAB GA GMB GM GEO GE DEU DE GHA GH GIB GI GRC GR GRL GL GRD GD GLP GP GUM GU GTM GT GIN GN GNB GW GUY GY HTI HT HND HN
HKG HK HUN HU ISL IS IND IN IDN ID IRN IR IRQ IQ IRL IE ISR IL ITA IT JAM JM JPN JP JOR JO KAZ KZ KEN KE KIR KI PRK KP KOR KR
XKX XK KWT KW KGZ KG LAO LA LVA LV LBN LB LSO LS LBR LR LBY LY LTU LT LUX LU MAC MO MDG MG MWI MW MYS MY MDV MV MLI ML MLT MT
MTQ MQ MRT MR MUS MU MEX MX MDA MD MNG MN MNE ME MSR MS MAR MA MOZ MZ MMR MM NAM NA NRU NR NPL NP NLD NL NCL NC NZL NZ NIC NI
NER NE NGA NG NIU NU MKD MK MNP MP NOR NO OMN OM PAK PK PSE PS PAN PA PNG PG PRY PY PER PE PHL PH POL PL PRT PT PRI PR QAT QA
REU RE ROU RO RUS RU RWA RW SHN SH KNA KN LCA LC SPM PM VCT VC WSM WS STP ST SAU SA SEN SN SRB RS SYC SC SLE SL SGP SG SVK SK
SVN SI SLB SB SOM SO ZAF ZA SSD SS ESP ES LKA LK SDN SD SUR SR SWE SE CHE CH SYR SY TWN TW TJK TJ TZA TZ THA TH TLS TL TGO TG
TON TO TTO TT TUN TN TUR TR TKM TM TCA TC TUV TV UGA UG UKR UA ARE AE GBR GB USA US VIR VI URY UY UZB UZ VUT VU VEN VE VNM VN
ESH EH YEM YE ZMB ZM ZWE ZW MHL MH FSM FM PLW PW MYT YT""".split()
ISO2 = dict(zip(ISO2[::2], ISO2[1::2]))
GROUPS = {
    "World": ("world", ""), "EU (Ember)": ("EU", "european-union"), "Africa (Ember)": ("africa", ""), "Asia (Ember)": ("asia", ""),
    "Europe (Ember)": ("europe", ""), "North America (Ember)": ("north-america", ""), "Oceania (Ember)": ("oceania", ""),
    "South America": ("south-america", ""), "Middle East (Ember)": ("middle-east", ""),
}
# Our World in Data's world figures of 2019 to 2024 span these two; spoken names that differ from the source's.
WORLD = (473.0, 505.5)
SPOKEN = {"ARE": "UAE", "GBR": "UK", "USA": "united states of america", "CZE": "czech republic", "KOR": "korea"}
# Read in Our World in Data's own file (owid/energy-data, owid-energy-data.csv, row of 2024), since copies of it lack the country.
ABSENT = [{"iso3": "ARE", "name": "United Arab Emirates", "year": "2024", "gco2e_per_kwh": "467.510", "source": "OWID"}]


def subdivision(row):
    found = re.fullmatch(r"(United States of America|Canada|Australia) - (.*) \[((?:US|CA|AU)-\w+)\]", row["name"])
    if not found:
        return None
    country, name, code = found.groups()
    code = {"CA-MT": "CA-MB"}.get(code, code)
    name = {"Mississip": "Mississippi", "Georgia": "Georgia (US)", "Washington": "Washington State"}.get(name, name)
    return code, "", name, row, "", "", "green-algorithms"


def country(row):
    name, iso3 = row["name"], row["iso3"]
    if name in GROUPS:
        code, alias = GROUPS[name]
        low, high = WORLD if code == "world" else ("", "")
        name = name.replace(" (Ember)", "")
        return code, alias if alias != name.lower() else "", name, row, low, high, "owid"
    if iso3 not in ISO2:
        return None
    aliases = "|".join(filter(None, [iso3, SPOKEN.get(iso3)]))
    return ISO2[iso3], aliases, name, row, "", "", "owid"


def countries(path):
    for row in [*csv.DictReader(open(path, newline="")), *ABSENT]:
        made = country(row) if row["source"].startswith("OWID") else subdivision(row) if "Green" in row["source"] else None
        if made and row["year"] and int(row["year"]) >= 2019:
            yield made


def google(path):
    years = {}
    for row in csv.DictReader(open(path, newline="")):
        found = re.search(r"region-carbon-info .*year (\d{4})", row["source"])
        if row["provider"] == "gcp" and found:
            years.setdefault(row["region"], []).append((int(found[1]), row))
    for region, rows in sorted(years.items()):
        rows.sort(key=lambda pair: pair[0])
        year, latest = rows[-1]
        values = [float(row["gco2e_per_kwh"]) for _, row in rows]
        latest = dict(latest, year=str(year))
        name = f"Google Cloud {region} ({latest['location']})"
        yield f"gcp:{region}", region, name, latest, min(values), max(values), "gcp"


def main():
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["code", "aliases", "name", "gco2e_per_kwh", "year", "low", "high", "dataset"])
    tidy = lambda value: value if value == "" else f"{float(value):.2f}".rstrip("0").rstrip(".")
    for code, aliases, name, row, low, high, dataset in [*countries(sys.argv[1]), *google(sys.argv[2])]:
        aliases = "|".join(a for a in aliases.split("|") if a.lower() != name.lower())
        if code.lower() == name.lower():
            name = name + " average"
        out.writerow([code, aliases, name, tidy(row["gco2e_per_kwh"]), row["year"], tidy(low), tidy(high), dataset])


if __name__ == "__main__":
    main()
