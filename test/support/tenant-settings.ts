/**
 * What can be set in the stand-in tenant, named after Auth0's dashboard, and what the README's guide sets for each kind
 * of client.
 */
import type { JSONWebKeySet } from "jose";
import type { Way } from "../run/setup/guide.ts";
import type { StoredAction, StoredBinding } from "./management.ts";

/** `scopes_supported` of every Auth0 tenant. An API's permissions are never among them. */
export const OIDC_SCOPES = (
  "openid profile offline_access name given_name family_name nickname " +
  "email email_verified picture created_at identities phone address"
).split(" ");

/** Two kinds since April 2026: Settings → Advanced → DCR Security Mode. */
export type TenantKind = "permissive" | "strict";

/** Applications → APIs. */
export interface Api {
  identifier: string;
  allowOfflineAccess: boolean;
  accessTokenProfile: "auth0" | "rfc9068";
  permissions: string[];
  /** Enable RBAC, together with Add Permissions in the Access Token. */
  enableRbac: boolean;
  /** User-Delegated Access of third-party applications: left out is Unauthorized. */
  defaultPermissionsForThirdPartyApplications?: string[];
  /** The Management API shows these three; the tenant signs with RS256 and lets every application in all the same. */
  signingAlgorithm?: string;
  encryptsTokens?: boolean;
  userAccessPolicy?: "allow_all" | "deny_all" | "require_client_grant";
}

/** User Management → Users. */
export interface User {
  sub: string;
  email: string;
  name: string;
  permissions: string[];
}

/** Applications → Applications, where clients that register themselves appear too. */
export interface Application {
  clientId: string;
  /** The document's URL, by which a client imported from it goes. */
  externalClientId?: string;
  clientSecret?: string;
  /** Credentials → Private Key JWT: the client's public keys, here or where `jwksUri` says. */
  jwks?: JSONWebKeySet;
  jwksUri?: string;
  name: string;
  party: "first-party" | TenantKind;
  callbackUrls: string[];
  grantTypes: string[];
  /** Connections tab, by name. It counts for first-party applications; third-party ones get all of domain level. */
  connections?: string[];
  /** Refresh Token Rotation → Rotation Overlap Period, in seconds; left out is 0. */
  rotationOverlap?: number;
  /** Identifiers of the APIs that a machine-to-machine application is authorized for. */
  authorizedApis?: string[];
  /** APIs → User Access, by identifier. */
  userDelegatedApis?: string[];
}

export interface TenantSettings {
  kind: TenantKind;
  dynamicClientRegistration: boolean;
  clientIdMetadataDocumentRegistration: boolean;
  defaultAudience: string;
  resourceParameterCompatibilityProfile: boolean;
  /** Settings → Advanced: `iss` with every answer of /authorize (RFC 9207). */
  includeIssuerInAuthorizationResponses: boolean;
  apis: Api[];
  /** Authentication → Database, Social, Enterprise. */
  connections: { name: string; domainLevel: boolean; strategy?: string }[];
  applications: Application[];
  applicationLimit: number;
  /** Whether `auth0-action.js` is in the post-login flow. */
  postLoginAction: boolean;
  users: User[];
  /** What a token without an API looks like: Auth0 issues either. */
  userinfoToken: "encrypted" | "opaque";
  /** Tokens that the Management API takes, with their scopes. */
  managementTokens?: Record<string, string[]>;
  /** What the Management API shows of Actions; left out, it follows `postLoginAction`. */
  actions?: StoredAction[];
  flow?: StoredBinding[];
}

export const ALICE: User = { sub: "auth0|alice", email: "alice@example.com", name: "Alice", permissions: [] };
export const BOB: User = { sub: "auth0|bob", email: "bob@example.com", name: "Bob", permissions: [] };

/** A tenant as Auth0 hands it over, with two users in it. */
export function newTenant(kind: TenantKind): TenantSettings {
  return {
    kind,
    dynamicClientRegistration: false,
    clientIdMetadataDocumentRegistration: false,
    defaultAudience: "",
    resourceParameterCompatibilityProfile: false,
    includeIssuerInAuthorizationResponses: false,
    apis: [],
    connections: [{ name: "Username-Password-Authentication", domainLevel: false }],
    applications: [],
    applicationLimit: 10,
    postLoginAction: false,
    users: [{ ...ALICE }, { ...BOB }],
    userinfoToken: "encrypted",
  };
}

/** How ChatGPT becomes a client of the tenant. */
export type { Way };

/** A way on a kind of tenant: together they decide what has to be set. */
export interface ClientKind {
  tenant: TenantKind;
  way: Way;
}

/** All there are: README, "Which way is yours". */
export const CLIENT_KINDS: ClientKind[] = [
  { tenant: "strict", way: "register" },
  { tenant: "strict", way: "cimd" },
  { tenant: "permissive", way: "cimd" },
  { tenant: "permissive", way: "register" },
  { tenant: "strict", way: "fixed" },
  { tenant: "permissive", way: "fixed" },
];

/** A client imported from its document is strict on any tenant; one made by hand is first-party on any. */
export const isStrict = ({ tenant, way }: ClientKind) => way === "cimd" || way === "register" && tenant === "strict";

/** The application that is made by hand in Step 5, and the id of the connection in ChatGPT that it is made for. */
export const FIXED_CLIENT = { client_id: "fixed", client_secret: "fixed-secret" };
export const FIXED_CALLBACK_ID = "fixed";

/** A setting of the guide: for which clients it has to be set, and what. */
interface GuideSetting {
  isNeeded: (client: ClientKind) => boolean;
  set: (settings: TenantSettings, mcpServerUrl: string) => void;
}

const PERMISSIONS = ["tasks:read", "tasks:write"];
const always = () => true;
const isFixed = ({ way }: ClientKind) => way === "fixed";
const fixedApplication = (changes: Partial<Application>) => ({ applications }: TenantSettings) => {
  const application = applications.find(({ clientId }) => clientId === FIXED_CLIENT.client_id);
  if (application) Object.assign(application, changes);
};

/**
 * The README's table "Which way is yours", in the order of its steps. The names are those of
 * `npm run demo -- --break`, where that has one.
 *
 * Two lie elsewhere: the import of ChatGPT's document (`Tenant.importFromUrl`) and "OIDC enabled" in ChatGPT's form,
 * which is to be unticked for strict clients.
 */
const SETTINGS = {
  "api": {
    isNeeded: always,
    set: ({ apis }, identifier) =>
      apis.push({
        identifier,
        allowOfflineAccess: false,
        accessTokenProfile: "auth0",
        permissions: PERMISSIONS,
        enableRbac: false,
      }),
  },
  "offline-access": {
    isNeeded: always,
    set: ({ apis }) => apis.forEach((api) => api.allowOfflineAccess = true),
  },
  "default-permissions": {
    isNeeded: isStrict,
    set: ({ apis }) => apis.forEach((api) => api.defaultPermissionsForThirdPartyApplications = PERMISSIONS),
  },
  "default-audience": {
    isNeeded: always,
    set: (settings, mcpServerUrl) => settings.defaultAudience = mcpServerUrl,
  },
  "registration": {
    isNeeded: ({ way }) => way === "register",
    set: (settings) => settings.dynamicClientRegistration = true,
  },
  "cimd": {
    isNeeded: ({ way }) => way === "cimd",
    set: (settings) => settings.clientIdMetadataDocumentRegistration = true,
  },
  "connection": {
    isNeeded: (client) => !isFixed(client),
    set: ({ connections }) => connections.forEach((connection) => connection.domainLevel = true),
  },
  "action": {
    isNeeded: (client) => !isStrict(client),
    set: (settings) => settings.postLoginAction = true,
  },
  "application": {
    isNeeded: isFixed,
    set: ({ applications }) =>
      applications.push({
        clientId: FIXED_CLIENT.client_id,
        clientSecret: FIXED_CLIENT.client_secret,
        name: "ChatGPT",
        party: "first-party",
        callbackUrls: [],
        grantTypes: ["authorization_code"],
      }),
  },
  "callback": {
    isNeeded: isFixed,
    set: fixedApplication({
      // Which of the two it is depends on Include Issuer in Authorization Responses.
      callbackUrls: [
        "https://chatgpt.com/connector_platform_oauth_redirect",
        `https://chatgpt.com/connector/oauth/${FIXED_CALLBACK_ID}`,
      ],
    }),
  },
  "application-connection": {
    isNeeded: isFixed,
    set: fixedApplication({ connections: ["Username-Password-Authentication"] }),
  },
  "refresh-grant": {
    isNeeded: isFixed,
    set: fixedApplication({ grantTypes: ["authorization_code", "refresh_token"] }),
  },
  "rotation": {
    isNeeded: isFixed,
    set: fixedApplication({ rotationOverlap: 30 }),
  },
} satisfies Record<string, GuideSetting>;

export type SettingName = keyof typeof SETTINGS;

/** What has to be set in the tenant for such a client, in the order of the steps. */
export function settingsFor(client: ClientKind): SettingName[] {
  return (Object.keys(SETTINGS) as SettingName[]).filter((name) => SETTINGS[name].isNeeded(client));
}

/**
 * The tenant after every step of the README's guide, with the machine-to-machine application of Step 6. ChatGPT's
 * document is still to be imported.
 *
 * @param leftOut What was forgotten.
 */
export function configuredTenant(
  tenant: TenantKind,
  mcpServerUrl: string,
  way: Way = "register",
  leftOut?: SettingName,
): TenantSettings {
  const settings = newTenant(tenant);
  for (const name of settingsFor({ tenant, way })) {
    if (name !== leftOut) SETTINGS[name].set(settings, mcpServerUrl);
  }
  settings.applications.unshift({
    clientId: "machine",
    clientSecret: "machine-secret",
    name: "MCP Server Test Client",
    party: "first-party",
    callbackUrls: [],
    grantTypes: ["client_credentials"],
    authorizedApis: [mcpServerUrl],
  });
  return settings;
}
